{{/* A pod template. dict root, group, component (head or worker).
     No label or annotation of the chart's version: every change in here builds a new cluster. */}}
{{- define "tokenflow.pod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $worker := eq .component "worker" -}}
{{- $values := $root.Values -}}
{{- $source := include "tokenflow.modelSource" $root -}}
{{- $kv := and $worker (ne (include "tokenflow.bytes" (dict "value" $values.kvStore.size "what" "kvStore.size")) "0") -}}
metadata:
  labels:
    {{- include "tokenflow.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $group.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- $annotations := $group.annotations | default dict }}
  {{- if $worker }}
  {{- $annotations = merge (dict "tokenflow-kv-layout" (include "tokenflow.kvLayout" $root)) $annotations }}
  {{- end }}
  {{- with $annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if or $worker (not $values.autoscaling.enabled) }}
  serviceAccountName: {{ include "tokenflow.serviceAccount" $root }}
  automountServiceAccountToken: false
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext: {{- toYaml $values.podSecurityContext | nindent 4 }}
  terminationGracePeriodSeconds: {{ add $values.drainSeconds 30 }}
  {{- range $key := list "nodeSelector" "affinity" "tolerations" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
  {{- with get $group $key }}
  {{ $key }}: {{- if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  {{- end }}
  {{- if or $group.initContainers (and $worker (eq $source "objectStore")) }}
  initContainers:
    {{- if and $worker (eq $source "objectStore") }}
    {{- with $values.model.objectStore }}
    - name: model
      image: {{ .image }}
      command: {{- toYaml (concat .command (list .uri "/models")) | nindent 8 }}
      {{- with .existingSecret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      resources:
        requests: {cpu: "1", memory: 1Gi}
        limits: {memory: 1Gi}
      env:
        - {name: HOME, value: /tmp}
      volumeMounts:
        - {name: model, mountPath: /models}
        - {name: tmp, mountPath: /tmp}
    {{- end }}
    {{- end }}
    {{- with $group.initContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  containers:
    # KubeRay takes the first one for Ray's, and gives it its command.
    - name: ray-{{ .component }}
      image: {{ include "tokenflow.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      resources: {{- toYaml $group.resources | nindent 8 }}
      ports: {{- include (printf "tokenflow.%sPorts" .component) $root | nindent 8 }}
      env:
        # As `tokenflow serve` sets them: HAProxy in front, with a limit on the time that the head of
        # a request may take, frames over gRPC, logs at once.
        - {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
        - {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
        - {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "1"}
        - {name: RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS, value: "10000"}
        - {name: RAY_SERVE_HAPROXY_BALANCE_ALGORITHM, value: "leastconn\n    timeout http-request 10s"}
        - {name: RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE, value: "1"}
        - {name: RAY_worker_niceness, value: "0"}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $values.drainSeconds | quote }}}
        - {name: HOME, value: /tmp}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- with $values.env }}{{ toYaml . | nindent 8 }}{{ end }}
        {{- with $group.env }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- with $group.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- range $key := list "startupProbe" "livenessProbe" "readinessProbe" }}
      {{- with get $group $key }}
      {{ $key }}: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        - {name: tmp, mountPath: /tmp}
        {{- if $kv }}
        - {name: kv, mountPath: {{ $values.kvStore.mountPath }}}
        {{- end }}
        {{- if and $worker $source }}
        - name: model
          mountPath: /models
          readOnly: true
          {{- with $values.model.pvc.subPath }}
          subPath: {{ . }}
          {{- end }}
        {{- end }}
        {{- if and $worker $values.auth.apiKeys.enabled }}
        - {name: api-keys, mountPath: /etc/tokenflow/keys, readOnly: true}
        {{- end }}
        {{- with $group.volumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
    {{- with $group.sidecars }}{{ toYaml . | nindent 4 }}{{ end }}
  volumes:
    # An own one: KubeRay's would be as large as the whole memory limit.
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $group.sharedMemory }}}
    - name: tmp
      emptyDir: {}
    {{- if $kv }}
    # Apart from /dev/shm, so that the KV store and Ray's object store cannot starve each other.
    - name: kv
      emptyDir: {medium: Memory, sizeLimit: {{ $values.kvStore.size }}}
    {{- end }}
    {{- if and $worker $source }}
    - name: model
      {{- if eq $source "pvc" }}
      persistentVolumeClaim: {claimName: {{ $values.model.pvc.claimName }}, readOnly: true}
      {{- else if eq $source "image" }}
      image: {{- toYaml $values.model.image | nindent 8 }}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.model.objectStore.size }}}
      {{- end }}
    {{- end }}
    {{- if and $worker $values.auth.apiKeys.enabled }}
    - name: api-keys
      secret:
        secretName: {{ $values.auth.apiKeys.existingSecret }}
        items:
          - {key: {{ $values.auth.apiKeys.key }}, path: keys.yaml}
    {{- end }}
    {{- with $group.volumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

{{/* A node's store keeps blocks of one layout for as long as the pod lives: what changes the layout
     needs other pods, and gets them by this annotation. */}}
{{- define "tokenflow.kvLayout" -}}
{{- $config := include "tokenflow.config" . | fromYaml -}}
{{- $engine := $config.engine | default dict -}}
{{- list (dig "model" "path" "" $config) $engine.block_size $engine.dtype $engine.tensor_parallel | toJson | sha256sum | trunc 12 -}}
{{- end -}}

{{/* Ports called serve and serve-* on the head become those of <name>-serve-svc. */}}
{{- define "tokenflow.headPorts" -}}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: metrics, containerPort: 8080}
- {name: as-metrics, containerPort: 44217}
- {name: dash-metrics, containerPort: 44227}
{{ include "tokenflow.servePorts" . }}
{{- end -}}

{{- define "tokenflow.workerPorts" -}}
- {name: metrics, containerPort: 8080}
{{ include "tokenflow.servePorts" . }}
{{- end -}}

{{- define "tokenflow.servePorts" -}}
{{- $ports := include "tokenflow.ports" . | fromYaml -}}
- {name: serve, containerPort: {{ $ports.http }}}
- {name: serve-grpc, containerPort: {{ $ports.grpc }}}
{{- end -}}
