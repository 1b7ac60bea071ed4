"""The variables the package reads: wrong values name the variable, whatever the user's home directory is."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from flashmoe_gen import env
from flashmoe_gen.cache import Cache
from flashmoe_gen.errors import CacheError, SpecError

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def clean(monkeypatch: Patch) -> None:
    for name in [*env.VARIABLES, "XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)


def without_home(monkeypatch: Patch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


BAD = {
    "FLASHMOE_CACHE_DIR": ["~no-such-user/cache"],
    "FLASHMOE_CACHE_TRUST": ["world", "0", "owner,group"],
    "FLASHMOE_TIMEOUT_S": [
        "soon",
        "-1",
        "nan",
        "inf",
        "1e10",
        "9223372036.9",
        "1e300",
        "1e-10",
        "5e-324",
        "1_0s",
        "0x10",
    ],
    "FLASHMOE_INIT_TIMEOUT_S": ["soon", "-1", "nan", "1e10"],
    "FLASHMOE_SECRET": [],  # wrong ones are not shown: test_secret
    "FLASHMOE_TARGET": ["gpu", "hosts"],
    "FLASHMOE_NO_JIT": ["2", "maybe"],
    "FLASHMOE_KEEP_SOURCE": ["~no-such-user"],
    "FLASHMOE_LOG": ["loud", "5"],
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in BAD.items() for value in values])
def test_wrong_values(name: str, value: str, monkeypatch: Patch) -> None:
    env.validate()
    monkeypatch.setenv(name, value)
    for read in (env.VARIABLES[name], env.validate):
        with pytest.raises(SpecError) as caught:
            read()
        assert f"{name}={value!r} is not valid" in str(caught.value)


@pytest.mark.parametrize("name", env.VARIABLES)
@pytest.mark.parametrize("value", ["", None])
def test_empty_is_not_set(name: str, value: str | None, monkeypatch: Patch) -> None:
    default = env.VARIABLES[name]()
    if value is not None:
        monkeypatch.setenv(name, value)
    assert env.VARIABLES[name]() == default


def test_every_variable_is_read(tmp_path: Path) -> None:
    text = (Path(env.__file__)).read_text()
    assert set(BAD) == set(env.VARIABLES) and all(text.count(f'"{name}"') >= 2 for name in env.VARIABLES)


def test_secret(monkeypatch: Patch) -> None:
    """Is never shown, whether it is right or wrong."""
    monkeypatch.setenv("FLASHMOE_SECRET", "hunter2")
    with pytest.raises(SpecError, match=r"FLASHMOE_SECRET has 7 characters. Must have 16 or more") as caught:
        env.validate()
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("FLASHMOE_SECRET", "hunter2" * 3)
    secret = env.secret()
    assert secret == b"hunter2" * 3 and f"{secret} {secret!r}" == "(set) (set)"


def test_timeouts_fit_nanoseconds(monkeypatch: Patch) -> None:
    for text, value in (("0", 0.0), ("1e9", 1e9), ("1e-9", 1e-9), (" 2.5 ", 2.5), ("0.0", 0.0)):
        monkeypatch.setenv("FLASHMOE_TIMEOUT_S", text)
        assert env.timeout_s() == value
        assert (int(value * 1e9) == 0) == (value == 0) and int(value * 1e9) < 2**63


def test_no_home_directory(monkeypatch: Patch) -> None:
    without_home(monkeypatch)
    for look in (env.cache_dir, Cache):
        with pytest.raises(CacheError, match=r"no home directory.*Set FLASHMOE_CACHE_DIR"):
            look()
    env.validate()  # it is no wrong value, and generating needs no cache
    for name in ("FLASHMOE_CACHE_DIR", "FLASHMOE_KEEP_SOURCE"):
        monkeypatch.setenv(name, "~/kernels")
        with pytest.raises(SpecError, match=f"{name}='~/kernels' is not valid"):
            env.VARIABLES[name]()
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "/somewhere")
    assert Cache().path == Path("/somewhere")


@pytest.mark.parametrize("home", ["relative", "~"])
def test_home_that_is_no_folder(home: str, monkeypatch: Patch, tmp_path: Path) -> None:
    """Nothing lands in a folder "~" or "relative" of the working directory: an absolute folder, or an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", home)
    try:
        assert env.cache_dir().is_absolute()
    except CacheError as error:
        assert "FLASHMOE_CACHE_DIR" in str(error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("home", ["/dev/null", "/proc/absent"])
def test_home_that_cannot_be_written(home: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", home)
    cache = Cache()
    assert cache.entries() == [] and cache.clear() == 0
    with pytest.raises(CacheError, match=f"{home}.*cannot be written.*FLASHMOE_CACHE_DIR"):
        cache.build("int x;", name="x", arch="host", digest="d", metadata={})


def test_the_root_of_a_cache_may_begin_with_a_tilde(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache(Path("~/kernels")).path == tmp_path / "kernels"
    with pytest.raises(SpecError, match="root='~no-such-user' is not valid"):
        Cache(Path("~no-such-user"))
