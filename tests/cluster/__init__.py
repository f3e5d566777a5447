"""A package, so that its one Ray is gone before the tests of other directories run; see conftest."""
