"""JSON and YAML in which no key comes twice in an object: the last one would count in silence."""

import json
from typing import Any, NoReturn

import yaml


class RepeatedKey(ValueError):
    """An object has a key twice."""


def loads(text: str) -> Any:
    """Strict JSON. ValueError for what is none, `RepeatedKey` for a key that comes twice."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)


def repeated_line(text: str) -> int:
    """The line in which the first item of a JSON list begins that has a key twice."""
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_once)
    at = text.index("[") + 1
    while True:
        while text[at].isspace() or text[at] == ",":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except RepeatedKey:
            return text.count("\n", 0, at) + 1


def load_yaml(text: str) -> Any:
    """A document of plain types. An error of YAML, with the line, for a key that comes twice."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain types, each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected each key once, got {key!r} again", key_node.start_mark
                )
            seen |= {key} if isinstance(key, str) else set()
        return super().construct_mapping(node, deep=deep)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"expected each key once in an object, got {again!r} twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
