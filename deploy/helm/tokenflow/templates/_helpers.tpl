{{- define "tokenflow.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* KubeRay derives the names of pods and Services from it, and allows 47 characters. */}}
{{- define "tokenflow.fullname" -}}
{{- $name := include "tokenflow.name" . -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- if or (gt (len $full) 47) (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full)) -}}
{{- fail (printf "the name %q must start with a letter, hold only a-z, 0-9 and -, and have at most 47 characters (KubeRay's limit); set fullnameOverride" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{/* What pods are selected by: stable over upgrades, unlike ray.io/cluster. */}}
{{- define "tokenflow.selector" -}}
app.kubernetes.io/name: {{ include "tokenflow.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tokenflow.metadata" -}}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "tokenflow.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
  {{- with .Values.commonLabels }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end -}}

{{/* dict root, own annotations */}}
{{- define "tokenflow.annotations" -}}
{{- with merge (dict) (.own | default dict) .root.Values.commonAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tokenflow.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (printf "%s-%s" .Chart.AppVersion (ternary "gpu" "cpu" (gt (int (include "tokenflow.allGpus" .)) 0))) }}
{{- end -}}
{{- end -}}

{{- define "tokenflow.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "tokenflow.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* A Kubernetes quantity in bytes. dict value, what */}}
{{- define "tokenflow.bytes" -}}
{{- $text := toString .value -}}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?([kMGT]|[KMGT]i)?$" $text) -}}
{{- fail (printf "%s must be a quantity such as \"64Gi\", got %q" .what $text) -}}
{{- end -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (float64 $number) (get $units (trimPrefix $number $text)) | printf "%.0f" -}}
{{- end -}}

{{- define "tokenflow.gib" -}}
{{- divf (float64 .) 1073741824.0 | printf "%.2f GiB" -}}
{{- end -}}

{{/* Worker groups with their defaults, as {groups: [...]}; also whether they have GPUs. */}}
{{- define "tokenflow.workerGroups" -}}
{{- $groups := list -}}
{{- range .Values.workerGroups -}}
{{- $groups = append $groups (mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy .)) -}}
{{- end -}}
{{- dict "groups" $groups | toYaml -}}
{{- end -}}

{{- define "tokenflow.gpus" -}}
{{- dig "resources" "limits" "nvidia.com/gpu" 0 . | int -}}
{{- end -}}

{{/* GPUs of one pod of each group, together: 0 = a cluster without GPUs. */}}
{{- define "tokenflow.allGpus" -}}
{{- $gpus := 0 -}}
{{- range (include "tokenflow.workerGroups" . | fromYaml).groups -}}
{{- $gpus = add $gpus (include "tokenflow.gpus" .) -}}
{{- end -}}
{{- $gpus -}}
{{- end -}}

{{/* The CPUs of a pod that Ray gives out: KubeRay takes the limit, else the request, and rounds up.
     With neither Ray counts those of the machine, which nobody knows here. dict group, what */}}
{{- define "tokenflow.cpus" -}}
{{- $text := toString (dig "resources" "limits" "cpu" (dig "resources" "requests" "cpu" "1000000" .group) .group) -}}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?m?$" $text) -}}
{{- fail (printf "%s: resources: cpu must be a quantity such as \"8\" or 500m, got %q" .what $text) -}}
{{- end -}}
{{- divf (float64 (trimSuffix "m" $text)) (ternary 1000.0 1.0 (hasSuffix "m" $text)) | ceil | printf "%.0f" -}}
{{- end -}}

{{/* The most and the fewest pods of a group. */}}
{{- define "tokenflow.most" -}}
{{- ternary (.group.maxReplicas | default 0) (.group.replicas | default .group.minReplicas) .root.Values.autoscaling.enabled | int -}}
{{- end -}}
{{- define "tokenflow.fewest" -}}
{{- ternary (.group.minReplicas | default 0) (.group.replicas | default .group.minReplicas) .root.Values.autoscaling.enabled | int -}}
{{- end -}}

{{- define "tokenflow.ports" -}}
{{- $ingress := .Values.config.ingress | default dict -}}
http: {{ $ingress.port | default 8000 | int }}
grpc: {{ $ingress.grpc_port | default 9000 | int }}
{{- end -}}

{{- define "tokenflow.modelSource" -}}
{{- $model := .Values.model -}}
{{- if $model.pvc.claimName }}pvc{{ else if $model.objectStore.uri }}objectStore{{ else if $model.image.reference }}image{{ end -}}
{{- end -}}

{{/* Both Services carry the same ports, as do the NetworkPolicy and the routes. */}}
{{- define "tokenflow.serveService" -}}
{{ include "tokenflow.fullname" . }}-serve-svc
{{- end -}}
