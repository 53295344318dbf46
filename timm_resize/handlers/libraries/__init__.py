"""Models of other libraries: a folder for each, in it a file for each of its modules that has models, by its name."""
