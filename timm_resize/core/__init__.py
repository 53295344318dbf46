"""Plan, then apply. Knows no architecture, no file and no function of timm."""
