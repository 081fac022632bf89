#!lua flags=allow-oom
-- What the highest class needs of a worker: KV slots to begin its first waiting job that this worker could ever hold.
-- ARGV  1 all KV slots of the worker
-- Reply: the slots, 0 if no such job waits.
--@include base
--@include jobs
--@include claims
local MAX_TENANTS = 16
for _, tenant in ipairs(call('ZRANGE', P .. 'act:0', 0, MAX_TENANTS - 1)) do
  local id = call('ZRANGE', P .. 'q:0:' .. tenant, 0, 0)[1]
  local j = id and load(id)
  if j and j.pk <= tonumber(ARGV[1]) then return slots(j) end
end
return 0
