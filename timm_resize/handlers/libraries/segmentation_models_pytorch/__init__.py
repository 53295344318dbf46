"""segmentation_models_pytorch: networks around a timm encoder."""
