"""Mapillary Vistas v1.2, validation split: 65 of its 66 classes are evaluated, 37 things and 28 stuff."""

benchmark = dict(
    title="Mapillary Vistas v1.2, 65 classes",
    version=1,
    order=15,
    group="panoptic",
    num_classes=65,
    has_background=False,
    expected_images=2000,
    homes=["", "mapillary_vistas", "mapillary"],
    labels_from="panoptic_2018.json and the PNGs beside it come with the archive of Mapillary Vistas v1.2 (registration)",
    zero_in_most=False,
    has_255=True,
)

dataset = dict(
    type="PanopticDataset",
    data_prefix=dict(img_path="validation/images", seg_map_path="validation/panoptic"),
    ann_file="",
    panoptic_file="validation/panoptic/panoptic_2018.json",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=False,
    ignore_index=255,
)

panoptic = dict(
    # 66 is unlabelled, which is not evaluated
    category_ids="1-65",
    things="0-1, 8, 19-23, 32-42, 44-57, 59-62",
    exact_areas=True,
)

train = dict(
    data_prefix=dict(img_path="training/images", seg_map_path="training/panoptic"),
    ann_file="",
    panoptic_file="training/panoptic/panoptic_2018.json",
    expected_images=18000,
    stems=["train_{i:018d}"],
)

synth = dict(
    home="mapillary_vistas",
    stems=["val_{i:018d}"],
    short=448,
    long=597,
    portraits=False,
    label_mode="RGB",
    void="strip",
    things="any",
)
