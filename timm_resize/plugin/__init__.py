"""The only room that puts something into timm, and takes it out again."""
