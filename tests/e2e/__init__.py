"""A package, so that its server is gone before the tests of other directories run; see conftest."""
