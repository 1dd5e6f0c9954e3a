"""ADE20K with all its classes (release 2021_17_01), validation split: 847 classes.

Labels of more than 255 classes have 16 bits. mmseg has no class for it, so its plain BaseSegDataset reads it.
"""

benchmark = dict(
    title="ADE20K, 847 classes",
    version=1,
    order=10,
    group="large-vocabulary",
    num_classes=847,
    has_background=False,
    expected_images=2000,
    homes=["", "ADE20K_2021_17_01", "ade20k_full/ADE20K_2021_17_01"],
    labels_from="images_detectron2 and annotations_detectron2 are made from ADE20K_2021_17_01 with MaskFormer's "
    "datasets/prepare_ade20k_full_sem_seg.py: 16-bit .tif, 0..846 = classes, 65535 = every other object and unlabelled",
    zero_in_most=False,
    has_255=True,
    ignored_in_most=True,
)

dataset = dict(
    type="BaseSegDataset",
    data_prefix=dict(img_path="images_detectron2/validation", seg_map_path="annotations_detectron2/validation"),
    ann_file="",
    img_suffix=".jpg",
    seg_map_suffix=".tif",
    reduce_zero_label=False,
    ignore_index=65535,
)

downloads = dict(
    val=["ADE20K_2021_17_01.zip"],
)

synth = dict(
    home="ADE20K_2021_17_01",
    stems=["ADE_val_{i:08d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="I;16",
    void="patch",
    things="any",
)
