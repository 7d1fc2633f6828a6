"""A config-first workbench for language-model architecture research."""
