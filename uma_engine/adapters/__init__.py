"""LoRA adapters: read from PEFT directories, checked, packed, and kept in slots.

Knows files, sites and slots; does not know requests' text, schedules or the KV cache.
"""

from uma_engine.adapters.loader import LoadedAdapter, load_adapter
from uma_engine.adapters.registry import AdapterInfo, AdapterRegistry
from uma_engine.adapters.store import AdapterStore, Known

__all__ = ["AdapterInfo", "AdapterRegistry", "AdapterStore", "Known", "LoadedAdapter", "load_adapter"]
