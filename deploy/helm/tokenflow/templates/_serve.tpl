{{/* The configuration file of `tokenflow serve`: the user's `config` with what the chart knows. */}}
{{- define "tokenflow.config" -}}
{{- $gpus := int (include "tokenflow.allGpus" .) -}}
{{- $kv := include "tokenflow.bytes" (dict "value" .Values.kvStore.size "what" "kvStore.size") -}}
{{- $kvstore := dict "host_kv_gib" 0 -}}
{{- if ne $kv "0" -}}
{{- $kvstore = dict "directory" .Values.kvStore.mountPath "host_kv_gib" (divf (float64 $kv) 1073741824.0 | mulf 0.9375) -}}
{{- end -}}
{{- $derived := dict "kvstore" $kvstore "ingress" (dict "host" "0.0.0.0") -}}
{{- /* Without GPUs a replica reserves a CPU: one that reserves nothing could be put on the head. */ -}}
{{- $_ := set $derived "replicas" (ternary (dict "gpus_each" (dig "engine" "tensor_parallel" 1 .Values.config | int)) (dict "gpus_each" 0 "cpus_each" 1) (gt $gpus 0)) -}}
{{- if include "tokenflow.modelSource" . -}}
{{- $_ := set $derived "model" (dict "path" "/models") -}}
{{- end -}}
{{- if .Values.auth.apiKeys.enabled -}}
{{- $_ := set $derived "security" (dict "api_keys_file" "/etc/tokenflow/keys/keys.yaml") -}}
{{- end -}}
{{- mergeOverwrite $derived (deepCopy .Values.config) | toYaml -}}
{{- end -}}

{{/* A change of this text alone is applied to the running cluster, without a new one. */}}
{{- define "tokenflow.serveConfig" -}}
{{- $ports := include "tokenflow.ports" . | fromYaml -}}
{{- $config := include "tokenflow.config" . | fromYaml -}}
{{- $ingress := dict "name" "ingress" "ray_actor_options" (dict "num_cpus" .Values.ingressCpus) -}}
{{- $application := dict
      "name" "tokenflow"
      "route_prefix" "/"
      "import_path" "tokenflow.cluster.app:app"
      "args" $config
      "deployments" (list $ingress) -}}
{{- $serve := dict
      "proxy_location" "EveryNode"
      "http_options" (dict "host" $config.ingress.host "port" $ports.http)
      "grpc_options" (dict
        "port" $ports.grpc
        "grpc_servicer_functions" (list
          "tokenflow.cluster.rpc.servicer.add_inference_to_server"
          "tokenflow.cluster.rpc.probes.add_reflection_to_server"
          "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"))
      "applications" (list $application) -}}
{{- mergeOverwrite $serve (deepCopy .Values.serveConfig) | toYaml -}}
{{- end -}}
