"""COCO val2017 as semantic segmentation of its 80 object classes and background.

mmseg has no class for it, so its plain BaseSegDataset reads it; class names and palette are filled in from the word
list.
"""

benchmark = dict(
    title="COCO Object, 80 classes + background",
    version=1,
    order=3,
    group="eight",
    num_classes=81,
    has_background=True,
    expected_images=5000,
    homes=["", "coco_object", "coco_stuff164k", "coco"],
    labels_from="*_instanceTrainIds.png are made from COCO-Stuff164k's label maps: things become 1..80 in category "
    "order (the id gaps closed), stuff and 255 become 0; the official instances drawn in that numbering do as well",
    zero_in_most=True,
    has_255=False,
    # Unused ids of COCO's categories: instances drawn with their category_id show none of them.
    raw_gaps=[12, 26, 29, 30, 45, 66, 68, 69, 71],
)

dataset = dict(
    type="BaseSegDataset",
    data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ann_file="",
    img_suffix=".jpg",
    seg_map_suffix="_instanceTrainIds.png",
    reduce_zero_label=False,
    ignore_index=255,
)

downloads = dict(
    val=["val2017.zip", "stuffthingmaps_trainval2017.zip"],
)

synth = dict(
    home="",
    stems=["{i:012d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="L",
    void="none",
    things="foreground",
)
