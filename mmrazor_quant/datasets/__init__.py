"""Datasets that need no download; a config names the module that it wants in ``custom_imports``."""
