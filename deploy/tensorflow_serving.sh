#!/bin/sh
# Serves an export with TensorFlow Serving: deploy/tensorflow_serving.sh EXPORT_DIR [more flags]
# Listens on every interface (TensorFlow Serving has no flag for that): put a firewall or a container around it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export_dir=$(cd "${1:?usage: tensorflow_serving.sh EXPORT_DIR [more flags]}" && pwd)
shift
# gRPC threads: calls past them get RESOURCE_EXHAUSTED, and batching keeps twice max_batch_size of them waiting.
exec tensorflow_model_server \
  --port=8500 \
  --rest_api_port=8501 \
  --model_name=ranker \
  --model_base_path="$export_dir" \
  --file_system_poll_wait_seconds=1 \
  --enable_model_warmup=true \
  --enable_grpc_healthcheck_service=true \
  --grpc_max_threads=64 \
  --enable_batching=true \
  --batching_parameters_file="$here/batching.config" \
  --monitoring_config_file="$here/monitoring.config" \
  "$@"
