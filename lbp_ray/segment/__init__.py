"""The region finder: annotated slices to out-of-fold masks of the lumbar region; ``python -m lbp_ray.segment``.

- ``config``: what a region finder is, one model per section.
- ``loss``: what a segmentation network is trained by and judged by, one number per image.
- ``samples``: slices and masks on one square grid, and how they are turned.
- ``loop``: one training loop for every segmentation network, by one worker or several.
- ``network``: what one network is: its specification, its address, its place.
- ``plan``: who may train what; the training set on disk.
- ``fold``: one network, trained to the end and committed.
- ``infer``: a trained network at work.
- ``masks``: masks of many exams, shard by shard.
- ``region``: what is measured of a mask, and which masks go to review.
- ``scores``: Dice and centroid error out of fold, beside a fixed mean box.
- ``review``: pictures and list of what a person should look at.
- ``page``: the regions as a self-contained page and as a console table.
- ``assemble``: all masks to the regions artefact.
- ``export``: masks back to CVAT, to be corrected there.
"""
