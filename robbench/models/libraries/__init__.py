"""Models of other libraries: ONNX files, timm, torchvision, RobustBench."""
