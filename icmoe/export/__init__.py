"""A trained model in forms that others run: adapters with a model card, ONNX, a MONAI bundle."""
