{{/* What a model's pods share, workers and registration: (dict "root" $ "model" $model). */}}

{{/* Where the model is, as TORCHRELAY_WORKER_MODEL. */}}
{{- define "torchrelay.model.location" -}}
{{- $source := .model.source -}}
{{- if $source.hub -}}
{{ $source.hub.id }}
{{- else if $source.initImage -}}
/models/model
{{- else -}}
{{- $path := trimAll "/" ((coalesce $source.volumeClaim $source.image).path | default "") -}}
{{ printf "/models/%s" $path | trimSuffix "/" }}
{{- end -}}
{{- end -}}

{{/* Puts a model's settings into a map. */}}
{{- define "torchrelay.model.env" -}}
{{- $env := .into -}}
{{- $_ := set $env "HOME" "/tmp" -}}
{{- $_ := set $env "XDG_CACHE_HOME" "/var/cache/torchrelay" -}}
{{- $_ := set $env "HF_HOME" "/var/cache/torchrelay/huggingface" -}}
{{- $_ := set $env "TRITON_CACHE_DIR" "/var/cache/torchrelay/triton" -}}
{{- $_ := set $env "TORCHRELAY_WORKER_MODEL" (include "torchrelay.model.location" .) -}}
{{- $_ := set $env "TORCHRELAY_WORKER_MODEL_NAME" .model.name -}}
{{- $_ := set $env "TORCHRELAY_WORKER_DTYPE" .model.dtype -}}
{{- if .model.source.hub -}}
{{- with .model.source.hub.revision }}{{ $_ := set $env "TORCHRELAY_WORKER_REVISION" . }}{{ end -}}
{{- with .model.source.hub.tokenSecret }}{{ $_ := set $env "HF_TOKEN" (include "torchrelay.fromSecret" (list . "token") | fromYaml) }}{{ end -}}
{{- else -}}
{{- $_ := set $env "HF_HUB_OFFLINE" "1" -}}
{{- end -}}
{{- if .model.adaptersVolumeClaim -}}
{{- $_ := set $env "TORCHRELAY_WORKER_ADAPTERS_DIR" "/adapters" -}}
{{- end -}}
{{- include "torchrelay.sharedEnv" (dict "root" .root "role" "worker" "into" $env) -}}
{{- end -}}

{{- define "torchrelay.model.image" -}}
{{- $image := ternary .root.Values.worker.cudaImage .root.Values.worker.image .model.gpu -}}
image: {{ include "torchrelay.image" (dict "root" .root "image" $image) }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end -}}

{{- define "torchrelay.model.initContainers" -}}
{{- with .model.source.initImage }}
initContainers:
  - name: model
    image: {{ .reference }}
    command: [cp, -R, {{ printf "%s/." (trimSuffix "/" .path) | quote }}, /models/model/]
    securityContext:
      {{- include "torchrelay.containerSecurity" $ | nindent 6 }}
    resources:
      requests: {cpu: 100m, memory: 128Mi}
      limits: {cpu: "1", memory: 1Gi}
    volumeMounts:
      - {name: model, mountPath: /models/model}
{{- end }}
{{- end -}}

{{- define "torchrelay.model.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
{{- if .model.cache.volumeClaim }}
  persistentVolumeClaim: {claimName: {{ .model.cache.volumeClaim }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .model.cache.size }}}
{{- end }}
{{- with .model.source.volumeClaim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .name }}, readOnly: true}
{{- end }}
{{- with .model.source.image }}
- name: model
  image: {reference: {{ .reference | quote }}, pullPolicy: {{ .pullPolicy | default "IfNotPresent" }}}
{{- end }}
{{- with .model.source.initImage }}
- name: model
  emptyDir: {sizeLimit: {{ .size | default "20Gi" }}}
{{- end }}
{{- with .model.adaptersVolumeClaim }}
- name: adapters
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- include "torchrelay.sharedVolumes" .root }}
{{- end -}}

{{- define "torchrelay.model.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /var/cache/torchrelay}
{{- if .model.source.initImage }}
- {name: model, mountPath: /models/model, readOnly: true}
{{- else if not .model.source.hub }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if .model.adaptersVolumeClaim }}
- {name: adapters, mountPath: /adapters, readOnly: true}
{{- end }}
{{- include "torchrelay.sharedMounts" .root }}
{{- end -}}
