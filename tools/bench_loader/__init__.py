"""Measures the loader against other ways of making the same views: `wherefrom bench loader`."""
