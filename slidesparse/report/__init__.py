"""Reads records, compares, draws, renders `report.md`. Looks at nothing but the result tree."""
