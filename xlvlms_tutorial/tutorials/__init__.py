"""What single chapters need beyond the package, a module a chapter."""
