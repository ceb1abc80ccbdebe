"""The parts of a report's section "Why", one module each: ``part(comparison, of_arms) -> Part``."""
