#!lua flags=allow-oom
-- The workers of a shard.
-- ARGV  1 most workers
-- Reply {{worker, ms of lease left, jobs held, info or ''} ...}
--@include base
local now, found = now_ms(), {}
local leases = call('ZREVRANGE', P .. 'wl', 0, ARGV[1] - 1, 'WITHSCORES')
for at = 1, #leases, 2 do
  local wid = leases[at]
  found[#found + 1] = { wid, leases[at + 1] - now, call('HLEN', P .. 'w:' .. wid), call('GET', P .. 'wi:' .. wid) or '' }
end
return found
