"""The papers' tables: schema, printed values, runs, comparison."""
