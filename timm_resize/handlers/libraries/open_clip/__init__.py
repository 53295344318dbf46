"""open_clip's image towers, and the models that hold one beside a text tower, which no image size changes."""
