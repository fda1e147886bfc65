"""Networks as plain modules, and where their weights come from.

- ``resnet``: ResNet50 as a feature backbone plus a last layer.
- ``folding``: the same backbone with less arithmetic, for extraction only.
- ``unet``: U-Net with a VGG11-BN encoder, for the lumbar region.
- ``syncnorm``: batch normalisation over the batch of all workers, also on CPUs.
- ``weights``: ImageNet, random or local weights, with a hash of what was loaded.
"""
