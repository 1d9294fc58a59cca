"""pdcluster: prefill/decode-disaggregated LLM serving on racks of unlike machines."""

__version__ = "0.1.0"
