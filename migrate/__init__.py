"""What users run and import: the command line programs, messages and configuration."""

__version__ = "0.1.0"
