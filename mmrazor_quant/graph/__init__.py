"""Passes over captured graphs: fold, decompose, insert, convert."""
