{{/* What the schema cannot say. Each failure tells what is wrong and what to do. */}}
{{- define "tokenflow.check" -}}
{{- $values := .Values -}}
{{- $config := $values.config -}}
{{- $groups := (include "tokenflow.workerGroups" . | fromYaml).groups -}}

{{- if not (has (dig "ingress" "host" "0.0.0.0" $config) (list "0.0.0.0" "::")) -}}
{{- fail (printf "config.ingress.host: %s is not where Kubernetes reaches a pod; leave it out" $config.ingress.host) -}}
{{- end -}}
{{- $sources := compact (list $values.model.pvc.claimName $values.model.objectStore.uri $values.model.image.reference) -}}
{{- if gt (len $sources) 1 -}}
{{- fail (printf "model: there is one model, got %d sources (%s); keep one of model.pvc, model.objectStore, model.image" (len $sources) (join ", " $sources)) -}}
{{- end -}}
{{- if $config.kvstore -}}
{{- fail "config.kvstore: the chart derives it; set kvStore.size, which also sizes the volume" -}}
{{- end -}}
{{- if dig "security" "api_keys_file" "" $config -}}
{{- fail "config.security.api_keys_file: the chart derives it; set auth.apiKeys.existingSecret, which is mounted there" -}}
{{- end -}}
{{- if dig "security" "tls" "" $config -}}
{{- fail "config.security.tls: KubeRay probes the pods with plain HTTP; end TLS at ingress.tlsSecret, or at your Gateway" -}}
{{- end -}}
{{- if and $values.model.image.reference (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "model.image needs Kubernetes 1.33 or later, this is %s; use model.pvc or model.objectStore" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and $values.auth.apiKeys.enabled (not $values.auth.apiKeys.existingSecret) -}}
{{- fail "auth.apiKeys.existingSecret: name the Secret with the hashed keys; make one with `tokenflow keys create` and `kubectl create secret generic NAME --from-file=keys.yaml`" -}}
{{- end -}}
{{- with $values.gcsFaultTolerance -}}
{{- if and .enabled (not .redisAddress) -}}
{{- fail "gcsFaultTolerance.redisAddress: name the Redis, host:port, or set gcsFaultTolerance.enabled: false" -}}
{{- end -}}
{{- if and .username (not .existingSecret) -}}
{{- fail "gcsFaultTolerance.existingSecret: a user name needs a password; name the Secret that holds it" -}}
{{- end -}}
{{- end -}}

{{- with $values.ingress -}}
{{- if and .enabled (not .host) }}{{ fail "ingress.host: name the host of the Ingress" }}{{ end -}}
{{- if .grpc.enabled -}}
{{- if not .grpc.host }}{{ fail "ingress.grpc.host: name the host of the gRPC Ingress" }}{{ end -}}
{{- if not .grpc.tlsSecret }}{{ fail "ingress.grpc.tlsSecret: gRPC through an ingress controller needs TLS; name a Secret of type kubernetes.io/tls" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if and $values.gateway.enabled (not $values.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs: name the Gateway that the routes belong to" -}}
{{- end -}}

{{- with $values.networkPolicy -}}
{{- if and .enabled .egress.enabled (not .egress.extra) -}}
{{- $reached := list -}}
{{- if $values.autoscaling.enabled }}{{ $reached = append $reached "the API server (autoscaling)" }}{{ end -}}
{{- if $values.gcsFaultTolerance.enabled }}{{ $reached = append $reached "Redis (gcsFaultTolerance)" }}{{ end -}}
{{- if $values.model.objectStore.uri }}{{ $reached = append $reached "the object store (model.objectStore)" }}{{ end -}}
{{- if dig "tracing" "endpoint" "" $config }}{{ $reached = append $reached "the collector (config.tracing.endpoint)" }}{{ end -}}
{{- if $reached -}}
{{- fail (printf "networkPolicy.egress.extra: the pods must reach %s; add rules, or set networkPolicy.egress.enabled: false" (join ", " $reached)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- with $values.upgrade -}}
{{- if eq .type "NewClusterWithIncrementalUpgrade" -}}
{{- if not $values.autoscaling.enabled }}{{ fail "upgrade.type NewClusterWithIncrementalUpgrade needs autoscaling.enabled: true" }}{{ end -}}
{{- if not .incremental.gatewayClassName }}{{ fail "upgrade.incremental.gatewayClassName: NewClusterWithIncrementalUpgrade makes a Gateway; name its class" }}{{ end -}}
{{- if gt (int .incremental.stepSizePercent) (int .incremental.maxSurgePercent) }}{{ fail "upgrade.incremental.stepSizePercent must not be above maxSurgePercent" }}{{ end -}}
{{- end -}}
{{- end -}}

{{- include "tokenflow.checkPod" (dict "root" . "group" $values.head "what" "head" "kv" "0") -}}
{{- if gt (int (include "tokenflow.gpus" $values.head)) 0 }}{{ fail "head.resources: the head runs no model; give GPUs to workerGroups" }}{{ end -}}
{{- $names := list -}}
{{- $replicas := (include "tokenflow.config" . | fromYaml).replicas -}}
{{- $gpusEach := float64 ($replicas.gpus_each | default 0) -}}
{{- $cpusEach := float64 ($replicas.cpus_each | default 0) -}}
{{- $wanted := ternary (dig "autoscaling" "max" 0 $replicas) ($replicas.count | default 1) (not (empty $replicas.autoscaling)) -}}
{{- $room := 0 -}}
{{- $cpus := 0 -}}
{{- range $groups -}}
{{- $what := printf "workerGroups %s" .name -}}
{{- if has .name $names }}{{ fail (printf "%s: two groups have this name" $what) }}{{ end -}}
{{- $names = append $names .name -}}
{{- if gt (int .minReplicas) (int .maxReplicas) }}{{ fail (printf "%s: minReplicas %d is above maxReplicas %d" $what (int .minReplicas) (int .maxReplicas)) }}{{ end -}}
{{- include "tokenflow.checkPod" (dict "root" $ "group" . "what" $what "kv" (include "tokenflow.bytes" (dict "value" $values.kvStore.size "what" "kvStore.size"))) -}}
{{- $pods := int (include "tokenflow.most" (dict "root" $ "group" .)) -}}
{{- $own := int (include "tokenflow.cpus" (dict "group" . "what" $what)) -}}
{{- $cpus = add $cpus (mul $own $pods) -}}
{{- /* A replica is in one pod, with all of its GPUs and CPUs. */ -}}
{{- $fit := int $wanted -}}
{{- if gt $gpusEach 0.0 }}{{ $fit = min $fit (int (floor (divf (float64 (include "tokenflow.gpus" .)) $gpusEach))) }}{{ end -}}
{{- if gt $cpusEach 0.0 }}{{ $fit = min $fit (int (floor (divf (float64 $own) $cpusEach))) }}{{ end -}}
{{- $room = add $room (mul $fit $pods) -}}
{{- end -}}
{{- if gt (int $wanted) (int $room) -}}
{{- fail (printf "config.replicas asks for %v replicas of %v GPUs and %v CPUs each, and the pods of all workerGroups have room for %d; raise their replicas (maxReplicas when autoscaling) or resources, or lower config.replicas" $wanted $gpusEach $cpusEach (int $room)) -}}
{{- end -}}
{{- $ingresses := dig "ingress" "count" 1 $config -}}
{{- $needed := addf (mulf (float64 $wanted) $cpusEach) (mulf (float64 $ingresses) (float64 $values.ingressCpus)) -}}
{{- if gt $needed (float64 $cpus) -}}
{{- fail (printf "CPUs do not add up: %v ingresses of %v (ingressCpus) and %v replicas of %v (config.replicas.cpus_each) need %v, and all workerGroups together have %d; raise resources or lower them" $ingresses $values.ingressCpus $wanted $cpusEach $needed (int $cpus)) -}}
{{- end -}}
{{- end -}}

{{/* Memory that adds up, and nothing that KubeRay refuses. dict root, group, what, kv (bytes) */}}
{{- define "tokenflow.checkPod" -}}
{{- $what := .what -}}
{{- $limit := dig "resources" "limits" "memory" "" .group -}}
{{- if not $limit }}{{ fail (printf "%s: set resources.limits.memory; memory-backed volumes count against it" $what) }}{{ end -}}
{{- $request := dig "resources" "requests" "memory" $limit .group -}}
{{- $limitBytes := include "tokenflow.bytes" (dict "value" $limit "what" (printf "%s: resources.limits.memory" $what)) -}}
{{- $requestBytes := include "tokenflow.bytes" (dict "value" $request "what" (printf "%s: resources.requests.memory" $what)) -}}
{{- if ne $limitBytes $requestBytes }}{{ fail (printf "%s: resources.requests.memory (%s) must equal limits.memory (%s): the node cannot take back what memory-backed volumes hold" $what $request $limit) }}{{ end -}}
{{- $shared := include "tokenflow.bytes" (dict "value" .group.sharedMemory "what" (printf "%s: sharedMemory" $what)) -}}
{{- $objects := include "tokenflow.bytes" (dict "value" .group.objectStoreMemory "what" (printf "%s: objectStoreMemory" $what)) -}}
{{- $processes := include "tokenflow.bytes" (dict "value" .group.processMemory "what" (printf "%s: processMemory" $what)) -}}
{{- if gt (float64 $objects) (float64 $shared) }}{{ fail (printf "%s: objectStoreMemory (%s) must fit in sharedMemory (%s)" $what .group.objectStoreMemory .group.sharedMemory) }}{{ end -}}
{{- $sum := addf (float64 .kv) (float64 $shared) (float64 $processes) -}}
{{- if gt $sum (float64 $limitBytes) -}}
{{- fail (printf "%s: memory does not add up: kvStore.size %s + sharedMemory %s + processMemory %s = %s, above resources.limits.memory %s; raise the limit or lower kvStore.size" $what (include "tokenflow.gib" .kv) (include "tokenflow.gib" $shared) (include "tokenflow.gib" $processes) (include "tokenflow.gib" $sum) (include "tokenflow.gib" $limitBytes)) -}}
{{- end -}}
{{- range $flag := list "num-cpus" "num-gpus" "memory" "labels" "object-store-memory" "plasma-directory" -}}
{{- if hasKey ($.group.rayStartParams | default dict) $flag }}{{ fail (printf "%s: rayStartParams.%s: the chart and KubeRay derive it from resources; leave it out" $what $flag) }}{{ end -}}
{{- end -}}
{{- range $label := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" -}}
{{- if hasKey ($.group.labels | default dict) $label }}{{ fail (printf "%s: labels: %s is what the chart selects pods by; leave it out" $what $label) }}{{ end -}}
{{- end -}}
{{- range concat (.root.Values.env | default list) (.group.env | default list) -}}
{{- if has .name (list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_enable_autoscaler_v2" "RAY_external_storage_namespace") -}}
{{- fail (printf "%s: env %s: KubeRay sets it; use gcsFaultTolerance or autoscaling" $what .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
