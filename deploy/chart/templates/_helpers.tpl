{{/* Names: short enough that what is made of them stays below 63 characters. */}}
{{- define "torchrelay.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "torchrelay.fullname" -}}
{{- $name := include "torchrelay.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* A model's name in names of Kubernetes: (dict "root" $ "name" ...). */}}
{{- define "torchrelay.model.slug" -}}
{{- .name | lower | replace "." "-" | replace "_" "-" | replace "/" "-" | replace ":" "-" | trimAll "-" -}}
{{- end -}}

{{- define "torchrelay.model.fullname" -}}
{{- printf "%s-worker-%s" (include "torchrelay.fullname" .root) (include "torchrelay.model.slug" .) | trunc 56 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels of everything: (dict "root" $ "component" ...). */}}
{{- define "torchrelay.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "torchrelay.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: torchrelay
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels that never change, by which pods are selected: (dict "root" $ "component" ... "model" optional). */}}
{{- define "torchrelay.selector" -}}
app.kubernetes.io/name: {{ include "torchrelay.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .model }}
torchrelay/model: {{ include "torchrelay.model.slug" (dict "name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end -}}

{{/* An image's reference: (dict "root" $ "image" ...). */}}
{{- define "torchrelay.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Lays a map over another, in place and at every depth: (list under over). What stands in `over` counts, false, 0 and "" too. */}}
{{- define "torchrelay.overlay" -}}
{{- $under := index . 0 -}}
{{- range $key, $value := index . 1 -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $under $key)) -}}
{{- include "torchrelay.overlay" (list (get $under $key) $value) -}}
{{- else -}}
{{- $_ := set $under $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names and contents of what cannot be told by the schema. */}}
{{- define "torchrelay.check" -}}
{{- $names := dict -}}
{{- range .Values.models -}}
{{- $name := include "torchrelay.model.fullname" (dict "root" $ "name" .name) -}}
{{- if hasKey $names $name -}}
{{- fail (printf "models: %q and %q would both be called %s in Kubernetes: rename one" (get $names $name) .name $name) -}}
{{- end -}}
{{- $_ := set $names $name .name -}}
{{- $model := deepCopy $.Values.modelDefaults -}}
{{- include "torchrelay.overlay" (list $model .) -}}
{{- if and $model.autoscaling.enabled (eq (int $model.autoscaling.minReplicas) 0) (not $model.register) -}}
{{- fail (printf "models: %s scales from zero, so it must be registered: set register, or autoscaling.minReplicas to 1" .name) -}}
{{- end -}}
{{- if gt (int $model.autoscaling.minReplicas) (int $model.autoscaling.maxReplicas) -}}
{{- fail (printf "models: %s has autoscaling.minReplicas above maxReplicas" .name) -}}
{{- end -}}
{{- if and (has $model.quantization (list "fp8" "int4")) (not $model.gpu) -}}
{{- fail (printf "models: %s asks for %s, which needs gpu: true" .name $model.quantization) -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway -}}
{{- if and (not .tls.secretName) (not .plaintext) -}}
{{- fail "gateway.plaintext is false: give gateway.tls.secretName, a Secret with tls.crt and tls.key" -}}
{{- end -}}
{{- if and (not .tls.secretName) (ne .tls.clientCertificates "none") -}}
{{- fail "gateway.tls.clientCertificates needs gateway.tls.secretName" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.auth.jwt.issuer (not .Values.auth.jwt.audience) -}}
{{- fail "auth.jwt.audience is needed beside auth.jwt.issuer, or tokens for other services would do" -}}
{{- end -}}
{{- if and .Values.auth.jwt.jwksUrl .Values.auth.jwt.jwksSecretName -}}
{{- fail "auth.jwt.jwksUrl and auth.jwt.jwksSecretName exclude each other" -}}
{{- end -}}
{{- range $role := list "gateway" "worker" "admin" -}}
{{- if and (get $.Values.redis.auth $role).username (not $.Values.redis.auth.secretName) -}}
{{- fail (printf "redis.auth.%s.username needs redis.auth.secretName, which holds its password" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Settings as a container's env, by name; a map is taken as it is (valueFrom). Sorted: what others refer to has names before T. */}}
{{- define "torchrelay.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
{{- if kindIs "map" $value }}
{{ toYaml $value | indent 2 }}
{{- else if kindIs "string" $value }}
  value: {{ $value | quote }}
{{- else }}
  value: {{ toJson $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Puts what both roles share into a map of settings: (dict "root" $ "role" "gateway"|"worker" "into" $env). */}}
{{- define "torchrelay.sharedEnv" -}}
{{- $v := .root.Values -}}
{{- $env := .into -}}
{{- $_ := set $env "TORCHRELAY_LOG_LEVEL" $v.logLevel -}}
{{- if $v.redis.url -}}
{{- $_ := set $env "TORCHRELAY_REDIS_URL" $v.redis.url -}}
{{- $user := get $v.redis.auth .role -}}
{{- if $user.username -}}
{{- $_ := set $env "TORCHRELAY_REDIS_USERNAME" $user.username -}}
{{- end -}}
{{- if $v.redis.auth.secretName -}}
{{- $_ := set $env "TORCHRELAY_REDIS_PASSWORD" (include "torchrelay.fromSecret" (list $v.redis.auth.secretName $user.passwordKey) | fromYaml) -}}
{{- end -}}
{{- if $v.redis.sentinel.username -}}
{{- $_ := set $env "TORCHRELAY_REDIS_SENTINEL_USERNAME" $v.redis.sentinel.username -}}
{{- end -}}
{{- if $v.redis.sentinel.secretName -}}
{{- $_ := set $env "TORCHRELAY_REDIS_SENTINEL_PASSWORD" (include "torchrelay.fromSecret" (list $v.redis.sentinel.secretName "sentinel-password") | fromYaml) -}}
{{- end -}}
{{- if $v.redis.tls.caSecretName -}}
{{- $_ := set $env "TORCHRELAY_REDIS_TLS_CA_FILE" "/etc/torchrelay/redis-ca/ca.crt" -}}
{{- end -}}
{{- if $v.redis.tls.clientSecretName -}}
{{- $_ := set $env "TORCHRELAY_REDIS_TLS_CERT_FILE" "/etc/torchrelay/redis-client/tls.crt" -}}
{{- $_ := set $env "TORCHRELAY_REDIS_TLS_KEY_FILE" "/etc/torchrelay/redis-client/tls.key" -}}
{{- end -}}
{{- else -}}
{{- $_ := set $env "TORCHRELAY_REDIS_URL" (printf "redis://%s:6379/0" (include "torchrelay.valkey.fullname" .root)) -}}
{{- $_ := set $env "TORCHRELAY_REDIS_USERNAME" .role -}}
{{- $_ := set $env "TORCHRELAY_REDIS_PASSWORD" (include "torchrelay.fromSecret" (list (include "torchrelay.valkey.secret" .root) (printf "%s-password" .role)) | fromYaml) -}}
{{- end -}}
{{- if $v.redis.minReplicas -}}
{{- $_ := set $env "TORCHRELAY_REDIS_MIN_REPLICAS" $v.redis.minReplicas -}}
{{- end -}}
{{- if $v.encryption.secretName -}}
{{- $_ := set $env "TORCHRELAY_ENCRYPTION_KEYS_FILE" "/etc/torchrelay/encryption/keys" -}}
{{- $_ := set $env "TORCHRELAY_ENCRYPTION_SEAL" $v.encryption.seal -}}
{{- $_ := set $env "TORCHRELAY_ENCRYPTION_ACCEPT_PLAINTEXT" $v.encryption.acceptPlaintext -}}
{{- end -}}
{{- if $v.tracing.endpoint -}}
{{- $_ := set $env "TORCHRELAY_TRACING_ENDPOINT" $v.tracing.endpoint -}}
{{- $_ := set $env "TORCHRELAY_TRACING_SAMPLE_RATIO" $v.tracing.sampleRatio -}}
{{- end -}}
{{- include "torchrelay.overlay" (list $env $v.env) -}}
{{- end -}}

{{/* The user that writes API keys, for gateways and the bootstrap Job: (dict "root" $ "into" $env). */}}
{{- define "torchrelay.adminEnv" -}}
{{- $v := .root.Values -}}
{{- $url := $v.redis.url -}}
{{- $user := $v.redis.auth.admin.username -}}
{{- $secret := $v.redis.auth.secretName -}}
{{- $key := $v.redis.auth.admin.passwordKey -}}
{{- if not $url -}}
{{- $url = printf "redis://%s:6379/0" (include "torchrelay.valkey.fullname" .root) -}}
{{- $user = "admin" -}}
{{- $secret = include "torchrelay.valkey.secret" .root -}}
{{- $key = "admin-password" -}}
{{- end -}}
{{- if $user -}}
{{- $parts := splitList "://" $url -}}
{{- $_ := set .into "REDIS_ADMIN_PASSWORD" (include "torchrelay.fromSecret" (list $secret $key) | fromYaml) -}}
{{- $_ := set .into "TORCHRELAY_GATEWAY_ADMIN_REDIS_URL" (printf "%s://%s:$(REDIS_ADMIN_PASSWORD)@%s" (first $parts) $user (last $parts)) -}}
{{- end -}}
{{- end -}}

{{- define "torchrelay.fromSecret" -}}
valueFrom:
  secretKeyRef:
    name: {{ index . 0 }}
    key: {{ index . 1 }}
{{- end -}}

{{/* Volumes and mounts of the files that both roles read. */}}
{{- define "torchrelay.sharedVolumes" -}}
{{- with .Values.encryption.secretName }}
- name: encryption
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if .Values.redis.url }}
{{- with .Values.redis.tls.caSecretName }}
- name: redis-ca
  secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- with .Values.redis.tls.clientSecretName }}
- name: redis-client
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end -}}

{{- define "torchrelay.sharedMounts" -}}
{{- if .Values.encryption.secretName }}
- {name: encryption, mountPath: /etc/torchrelay/encryption, readOnly: true}
{{- end }}
{{- if .Values.redis.url }}
{{- if .Values.redis.tls.caSecretName }}
- {name: redis-ca, mountPath: /etc/torchrelay/redis-ca, readOnly: true}
{{- end }}
{{- if .Values.redis.tls.clientSecretName }}
- {name: redis-client, mountPath: /etc/torchrelay/redis-client, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{/* What a pod may do: nothing that it does not need. The argument is its user. */}}
{{- define "torchrelay.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "torchrelay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where pods run: (dict "values" ... "selector" labels "keys" topology keys). */}}
{{- define "torchrelay.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if .keys }}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
{{ toYaml .values.topologySpreadConstraints | indent 2 }}
{{- else }}
{{- $selector := .selector }}
{{- range .keys }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
{{ $selector | indent 8 }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "torchrelay.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "torchrelay.valkey.fullname" -}}
{{ include "torchrelay.fullname" . }}-valkey
{{- end -}}

{{- define "torchrelay.valkey.secret" -}}
{{ .Values.valkey.existingSecret | default (include "torchrelay.valkey.fullname" .) }}
{{- end -}}
