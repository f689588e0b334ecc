"""The positions of image tokens among token ids."""

from accessory.data.image_tokens import image_start, insert_image_tokens
from accessory.vision_config import IMAGE_ID


def test_where_an_image_stands():
    assert insert_image_tokens([1, 5, 6], 2, bos_id=1) == [1, IMAGE_ID, IMAGE_ID, 5, 6]
    assert insert_image_tokens([5, 6], 2, bos_id=1) == [IMAGE_ID, IMAGE_ID, 5, 6]
    assert insert_image_tokens([5, 6], 2, bos_id=None) == [IMAGE_ID, IMAGE_ID, 5, 6]
    assert insert_image_tokens([1, 5], 0, bos_id=1) == [1, 5]
    assert [image_start(ids, bos_id=1) for ids in ([1, 5], [5, 1], [])] == [1, 0, 0]
