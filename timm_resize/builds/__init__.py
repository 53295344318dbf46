"""What depends on the image size, found by building a model at several sizes, for classes that nobody taught us."""
