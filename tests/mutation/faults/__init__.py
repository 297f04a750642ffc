"""The faults, by what they are faults of."""

from tests.mutation.faults import (
    _audit,
    _captures,
    _checkpoints,
    _cli,
    _collections,
    _compat,
    _equivalence,
    _functional,
    _host,
    _layers,
    _lifted,
    _sharding,
    _transforms,
    _weights,
)

FAULTS = [
    fault
    for area in (
        _audit,
        _captures,
        _checkpoints,
        _cli,
        _collections,
        _compat,
        _equivalence,
        _functional,
        _host,
        _layers,
        _lifted,
        _sharding,
        _transforms,
        _weights,
    )
    for fault in area.FAULTS
]
