"""From a raw log to a draft of its schema."""
