"""The commands of the command line: each calls the Python interface and shows what it returns."""
