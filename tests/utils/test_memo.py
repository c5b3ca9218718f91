"""A memory with room for so many entries."""

from shardes.utils.memo import Memo


def test_a_value_is_computed_once_until_there_is_no_room():
    memo, computed = Memo(2), []

    def value(key):
        return memo.get(key, lambda: computed.append(key) or key * 2)

    assert [value(1), value(1), value(2), value(1)] == [2, 2, 4, 2]
    assert computed == [1, 2]
    assert [value(3), value(1)] == [6, 2]
    assert computed == [1, 2, 3, 1]
