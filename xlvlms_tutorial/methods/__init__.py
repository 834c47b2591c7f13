"""The methods of the papers, a package a subject."""
