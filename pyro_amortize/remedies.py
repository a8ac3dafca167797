"""What to write where a latent has a table and is to have an encoder: a line that works, by the model's structure."""

from __future__ import annotations

from pyro_amortize.structure import Site, Structure


def instead_of_table(site: Site, facts: Structure, is_local: bool) -> str:
    """Returns what to write so that a latent in plates has an encoder.

    Args:
        site: The latent.
        facts: The model's structure.
        is_local: Whether rows of data were found that belong to its elements.
    """
    guide = f"AutoAmortizedNormal(model, encoder={{'{site.name}': MLP()}}"
    if is_local:
        return f"use an encoder: {guide})"
    plates = "/".join(site.plates)
    none = f"no rows of data were found of which each informs one element of '{site.name}' (plate '{plates}')"
    argument, design = fitting_argument(site, facts), _design(site, facts)
    if argument is not None:
        return f"{none}; if those of '{argument}' do, say so: {guide}, inputs={{'{site.name}': '{argument}'}})"
    if design is not None:
        return f"{none}; say what does, by a function of the model's arguments: {guide}, inputs={{{design}}})"
    sizes = ", ".join(str(facts.plates[plate].size) for plate in site.plates)
    return (
        f"{none}. Sample the data in that plate, or let an integer argument say the element of each row "
        f"({site.name}[..., index]); or give a function f of the model's arguments that returns shape ({sizes}, ...), "
        f"a row for each element: {guide}, inputs={{'{site.name}': f}})"
    )


def fitting_axes(name: str, target: tuple[str, ...], facts: Structure) -> tuple[int, ...] | None:
    """Returns the axis of an argument for each of some plates, by lengths; None where it lacks one."""
    shape, axes = facts.shapes.get(name, ()), list[int]()
    for plate in (facts.plates[plate] for plate in target):
        fits = [i for i, n in enumerate(shape) if n in (plate.size, plate.full_size) and i not in axes]
        if not fits:
            return None
        axes.append(fits[0])
    return tuple(axes) if shape else None


def fitting_argument(site: Site, facts: Structure) -> str | None:
    """Finds an argument that is observed where a latent informs it, as one event, with a row for each element."""
    placed = {source.name for source in facts.sources}
    for name in facts.carried:
        informed = facts.carried[name] & facts.informing(site.name)
        if informed and name not in placed and fitting_axes(name, site.plates, facts) is not None:
            return name
    return None


def _design(site: Site, facts: Structure) -> str | None:
    """Writes the function that adds up rows of data by a matrix of theirs, rows x elements, as in ``z @ b``."""
    if len(site.plates) != 1:
        return None
    size = facts.plates[site.plates[0]].size
    for data, sites in facts.carried.items():
        shape = facts.shapes[data]
        if not (sites & facts.informing(site.name) and len(shape) == 1 and data in facts.parameters):
            continue
        for name in facts.parameters:
            if size != shape[0] and sorted(facts.shapes.get(name, ())) == sorted((shape[0], size)):
                matrix = f"{name}.T" if facts.shapes[name][0] == shape[0] else name
                matrix = f"{matrix}.to({data})"
                rows = f"torch.stack([{matrix} @ {data}, {matrix}.sum(-1)], -1)"
                return f"'{site.name}': lambda {', '.join(facts.parameters)}: {rows}"
    return None
