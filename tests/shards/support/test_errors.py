import pickle

import pytest

from shards.support.errors import ConfigError, DataError, DivergedError, EnvironmentFault, FrepaError


def test_a_message_says_what_where_what_is_allowed_and_how_to_mend_it():
    error = DataError("is empty", where="a/b", allowed="images", fix="put some there")
    assert str(error) == "a/b: is empty; allowed: images; to mend it: put some there"


@pytest.mark.parametrize(
    ("kind", "code"), [(ConfigError, 2), (DataError, 3), (DivergedError, 4), (EnvironmentFault, 5)]
)
def test_errors_survive_the_way_back_from_a_worker(kind: type[FrepaError], code: int):
    error = pickle.loads(pickle.dumps(kind("what", where="w", allowed="a", fix="f")))
    assert type(error) is kind
    assert str(error) == str(kind("what", where="w", allowed="a", fix="f"))
    assert error.exit_code == code
