"""What differs between the layers of a model: rotary embeddings and windows, read from config.json.

Owns how the families spell them, and which layers a pattern means where layer_types is absent.
"""

from s1engine.checks import shown
from s1engine.models.config_reader import ConfigReader
from s1engine.models.families import Family
from s1engine.models.rope import Rope, parse_rope, parse_rope_section

LAYER_TYPES = ("full_attention", "sliding_attention")


def parse_ropes(
    config: ConfigReader, family: Family, max_positions: int, head_dim: int
) -> tuple[Rope, Rope | None]:
    """The rotary embedding, and that of layers with a window if it is another one."""
    if family.rope_by_layer_type:
        return _ropes_by_layer_type(config, family, max_positions)
    if family.fused_projections:  # Phi3
        config = _phi3_rope(config)
    further = {"llama_4_scaling_beta", "max_position_embeddings"} if family.query_growth else ()
    rope = parse_rope(config, max_positions, further_keys=frozenset(further))
    rotary_dim = rope.rotary_dim(head_dim)
    if rope.partial != 1.0 and not family.partial_rotary:
        raise config.error("partial_rotary_factor", "other than 1 is not supported")
    if rotary_dim < 2 or rotary_dim % 2:
        raise config.error("partial_rotary_factor", f"leaves {rotary_dim} dimensions to rotate")
    for key in ("short_factor", "long_factor"):
        if rope.scaling and len(rope.scaling.get(key, ())) not in (0, rotary_dim // 2):
            raise config.error(f"rope_scaling.{key}", f"must hold {rotary_dim // 2} numbers")
    return rope, None


def _phi3_rope(config: ConfigReader) -> ConfigReader:
    """Phi3 calls longrope by older names too, and keeps its original length outside of the section;
    other kinds of scaling it has not."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    section = config.section(key)
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise section.error(
            "rope_type", f"{shown(kind)} is not supported; supported: default, longrope"
        )
    original = config.integer("original_max_position_embeddings")
    fields = {name: section.get(name) for name in section if section.get(name) is not None}
    fields["rope_type"] = "default" if kind == "default" else "longrope"
    if kind != "default":
        fields["original_max_position_embeddings"] = original
    return config.with_defaults({}, overrides={key: fields})


def _ropes_by_layer_type(
    config: ConfigReader, family: Family, max_positions: int
) -> tuple[Rope, Rope]:
    sections = config.section("rope_parameters")
    for key in sections:
        if key not in LAYER_TYPES:
            raise sections.error(key, "is not known: there is a section for each layer type")
    full = sections.section("full_attention")
    if config.get("rope_scaling"):
        full = config.section("rope_scaling")
    theta = config.number("rope_theta", low=2)
    local_theta = config.number("rope_local_base_freq", family.local_theta, low=2)
    local = sections.section("sliding_attention")
    ropes = (
        parse_rope_section(full, Rope(theta=theta), max_positions),
        parse_rope_section(local, Rope(theta=local_theta), max_positions),
    )
    if any(rope.partial != 1.0 for rope in ropes):
        raise sections.error("partial_rotary_factor", "other than 1 is not supported")
    return ropes


def parse_query_growth(config: ConfigReader, family: Family) -> tuple[float, int] | None:
    """Beta and original length of Llama 4's scaling of queries by their position."""
    if not family.query_growth:
        return None
    rope = config.section("rope_parameters")
    beta = rope.number("llama_4_scaling_beta", 0.0)
    return (beta, rope.integer("original_max_position_embeddings")) if beta else None


def parse_layers_without_rope(
    config: ConfigReader, family: Family, num_layers: int
) -> frozenset[int]:
    """Indices of the layers whose queries and keys are not rotated."""
    if not family.layers_without_rope:
        return frozenset()
    interval = config.integer("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) < num_layers:
        raise config.error("no_rope_layers", f"must have an entry for each of {num_layers} layers")
    if not all(entry in (0, 1) for entry in rotated):
        raise config.error("no_rope_layers", "must hold 1 (rotated) and 0 only")
    return frozenset(layer for layer in range(num_layers) if not rotated[layer])


def parse_windows(
    config: ConfigReader,
    family: Family,
    num_layers: int,
    max_positions: int,
    without_rope: frozenset[int],
) -> tuple[int, ...]:
    """The window of each layer; 0: full attention. A window as long as the longest context is
    none."""
    window = 0
    if family.windows != "none" and "sliding_window" in config:
        window = config.integer("sliding_window")
    if family.window_switch and not config.flag("use_sliding_window", False):
        window = 0
    default = [
        _has_window(config, family, layer, window, without_rope) for layer in range(num_layers)
    ]
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if has else "full_attention" for has in default]
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", f"must name the type of each of {num_layers} layers")
    for name in types:
        if name not in LAYER_TYPES:
            raise config.error("layer_types", f"has {shown(name)}, which is not supported")
    has_window = [name == "sliding_attention" for name in types]
    if family.windows in ("none", "all") and has_window != default:
        raise config.error("layer_types", "differs from sliding_window, which holds for all layers")
    if any(has_window) and not window:
        raise config.error("layer_types", "has sliding_attention, but there is no sliding_window")
    if window >= max_positions and not family.rope_by_layer_type:
        window = 0
    return tuple(window if has else 0 for has in has_window)


def _has_window(
    config: ConfigReader, family: Family, layer: int, window: int, without_rope: frozenset[int]
) -> bool:
    """Does transformers' class give this layer a window without layer_types?"""
    match family.windows:
        case "none":
            return False
        case "all":
            return window > 0
        case "from_layer":
            return window > 0 and layer >= config.integer("max_window_layers", low=0)
        case "without_rope":
            return window > 0 and layer in without_rope
        case "pattern":
            pattern = config.integer("sliding_window_pattern", family.window_pattern)
            return (layer + 1) % pattern != 0
