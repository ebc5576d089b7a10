"""Thin faces with the names, calls and results of other libraries: change the import and keep the code."""
