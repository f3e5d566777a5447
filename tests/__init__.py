"""A package for pytest's sake: only of packages does it end the fixtures that belong to one directory."""
