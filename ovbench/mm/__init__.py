"""The only adapter to mmseg, mmengine and mmcv."""
