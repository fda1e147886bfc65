"""Networks as plain modules, and where their weights come from.

- ``resnet``: ResNet50 as a feature backbone plus a last layer.
- ``weights``: ImageNet, random or local weights, with a hash of what was loaded.
"""
