"""The tripwire: what we rely on in vLLM still looks as it did when we wrote against it.

`upstream_signatures.json` holds the signatures of the supported release. When this fails, read the
named one's new meaning, mend our side, and record anew:

    python tests/integration/test_upstream_signatures.py
"""

import importlib
import inspect
import json
from pathlib import Path

RECORD = Path(__file__).with_name("upstream_signatures.json")

RELIED_ON = {
    "vllm.distributed.device_communicators.shm_broadcast:SpinCondition": ["__init__", "wait"],
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory": [
        "register_connector",
    ],
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:OffloadingConnector": [
        "__init__",
        "build_connector_meta",
        "build_prom_metrics",
        "get_kv_connector_stats",
        "get_num_new_matched_tokens",
        "on_new_request",
        "request_finished_all_groups",
        "shutdown",
        "update_state_after_alloc",
    ],
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics:OffloadingConnectorStats": [
        "increase_counter",
        "set_gauge",
    ],
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:RequestOffloadState": [
        "update_offload_keys",
    ],
    "vllm.engine.arg_utils:EngineArgs": ["add_cli_args", "from_cli_args"],
    "vllm.model_executor.model_loader:": ["get_model"],
    "vllm.model_executor.model_loader.base_loader:": ["initialize_model"],
    "vllm.model_executor.models.utils:": ["extract_layer_index", "make_layers"],
    "vllm.model_executor.models.utils:PPMissingLayer": ["forward"],
    "vllm.sequence:IntermediateTensors": ["__init__", "items"],
    "vllm.v1.attention.backends.cpu_attn:": ["_get_attn_isa"],
    "vllm.v1.attention.backends.utils:": ["record_kv_cache_layout"],
    "vllm.v1.core.kv_cache_utils:": [
        "_pool_bytes_per_block",
        "_project_kv_cache_groups_to_worker",
        "get_kv_cache_config_from_groups",
        "resolve_none_hash_seed",
    ],
    "vllm.v1.core.sched.output:CachedRequestData": ["__init__"],
    "vllm.v1.core.sched.output:NewRequestData": ["__init__"],
    "vllm.v1.core.sched.output:SchedulerOutput": ["__init__"],
    "vllm.v1.core.sched.scheduler:Scheduler": ["reset_prefix_cache", "update_from_output"],
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": [
        "_init_executor",
        "collective_rpc",
        "determine_available_memory",
        "execute_model",
        "get_kv_cache_specs",
        "initialize_from_config",
        "sample_tokens",
        "shutdown",
    ],
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": ["__init__"],
    "vllm.v1.kv_cache_interface:FullAttentionSpec": ["__init__"],
    "vllm.v1.kv_cache_interface:KVCacheConfig": ["__init__"],
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ["__init__"],
    "vllm.v1.kv_cache_interface:KVCacheTensor": ["__init__"],
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": ["__init__"],
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": ["__init__"],
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs": ["__init__"],
    "vllm.v1.kv_offload.base:GPULoadStoreSpec": ["__init__"],
    "vllm.v1.kv_offload.base:ReqContext": ["__init__", "get_offload_key_position"],
    "vllm.v1.kv_offload.base:OffloadingWorker": [
        "get_finished",
        "shutdown",
        "submit_load",
        "submit_store",
        "wait",
    ],
    "vllm.v1.kv_offload.cpu.manager:CPUOffloadingManager": ["prepare_store"],
    "vllm.v1.kv_offload.cpu.policies.base:CachePolicy": [
        "__init__",
        "clear",
        "evict",
        "get",
        "insert",
        "mark_evictable",
        "mark_non_evictable",
        "on_request_finished",
        "on_store_miss",
        "remove",
        "touch",
    ],
    "vllm.v1.kv_offload.cpu.policies.base:ChunkStatus": ["__init__"],
    "vllm.v1.kv_offload.cpu.shared_offload_region:SharedOffloadRegion": [
        "__init__",
        "cleanup",
        "create_next_worker_view",
    ],
    "vllm.v1.kv_offload.factory:OffloadingSpecFactory": ["register_spec"],
    "vllm.v1.kv_offload.tiering.base:JobResult": ["__init__"],
    "vllm.v1.kv_offload.tiering.base:SecondaryTierManager": [
        "__init__",
        "build_metric_definitions",
        "drain_jobs",
        "get_finished_jobs",
        "get_stats",
        "lookup",
        "on_new_request",
        "on_request_finished",
        "on_schedule_end",
        "shutdown",
        "submit_load",
        "submit_store",
        "touch",
    ],
    "vllm.v1.kv_offload.tiering.base:TransferJob": ["__init__"],
    "vllm.v1.kv_offload.tiering.factory:SecondaryTierFactory": ["register_tier"],
    "vllm.v1.kv_offload.tiering.spec:TieringOffloadingSpec": [
        "create_worker",
        "get_manager",
        "get_worker",
    ],
    "vllm.v1.worker.block_table:MultiGroupBlockTable": ["compute_slot_mapping"],
    "vllm.v1.outputs:ModelRunnerOutput": ["__init__"],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": [
        "__init__",
        "execute_model",
        "initialize_kv_cache",
        "sync_and_gather_intermediate_tensors",
    ],
    "vllm.v1.worker.utils:": ["clear_layer_kv_caches"],
    "vllm.v1.worker.worker_base:WorkerWrapperBase": ["__init__", "init_device", "init_worker"],
}


def signatures() -> dict[str, str]:
    """Dotted name -> signature, as the installed vLLM has it; "(gone)" where it is not there."""
    found = {}
    for place, names in RELIED_ON.items():
        module, _, owner = place.partition(":")
        holder = importlib.import_module(module)
        holder = getattr(holder, owner, None) if owner else holder
        for name in names:
            member = getattr(holder, name, None)
            dotted = f"{module}.{owner}.{name}" if owner else f"{module}.{name}"
            found[dotted] = str(inspect.signature(member)) if member else "(gone)"
    return found


def test_signatures_that_we_rely_on_have_not_moved():
    recorded = json.loads(RECORD.read_text())
    moved = {
        name: f"was {recorded.get(name)}, is {now}"
        for name, now in signatures().items()
        if recorded.get(name) != now
    }
    assert not moved, moved


if __name__ == "__main__":
    RECORD.write_text(json.dumps(signatures(), indent=2, sort_keys=True) + "\n")
