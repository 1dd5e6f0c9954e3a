"""PASCAL Context with all its classes (VOC 2010 images), validation split: 459 classes.

Labels of more than 255 classes have 16 bits. mmseg has no class for it, so its plain BaseSegDataset reads it.
"""

benchmark = dict(
    title="PASCAL Context, 459 classes",
    version=1,
    order=11,
    group="large-vocabulary",
    num_classes=459,
    has_background=False,
    expected_images=5104,
    homes=["", "VOC2010", "VOCdevkit/VOC2010"],
    labels_from="annotations_detectron2/pc459_val is made from PASCAL Context's trainval.tar.gz (.mat) and "
    "pascalcontext_val.txt with CAT-Seg's datasets/prepare_pascal_context_459.py: 16-bit .tif, 0..458 = classes, "
    "65535 = unlabelled",
    zero_in_most=False,
    # The conversion would write it for the annotation 0; nothing says whether that occurs.
    has_255=True,
)

dataset = dict(
    type="BaseSegDataset",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="annotations_detectron2/pc459_val"),
    ann_file="pascalcontext_val.txt",
    img_suffix=".jpg",
    seg_map_suffix=".tif",
    reduce_zero_label=False,
    ignore_index=65535,
)

downloads = dict(
    val=["VOCtrainval_03-May-2010.tar", "trainval.tar.gz", "pascalcontext_val.txt"],
)

synth = dict(
    home="VOCdevkit/VOC2010",
    stems=["2008_{i:06d}", "2009_{i:06d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="I;16",
    void="patch",
    things="any",
)
