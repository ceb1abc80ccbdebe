"""The sections of the report of a comparison, one module each: ``section(comparison) -> Section``."""
