"""torchvision's models that have size-dependent state; its other classifiers run at any size as they are."""
