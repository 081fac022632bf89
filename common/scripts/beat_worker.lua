#!lua flags=allow-oom
-- A worker's heartbeat: renews its lease, stores what it says of itself and when, tells which jobs it lost, and who has
-- asked it to drain.
-- ARGV  1 worker  2 lease ms  3 info  then held jobs: id  "<epoch>-"
-- Reply as commit's, then who has asked it to drain or ''.
--@include base
--@include jobs
set_schema()
local wid, now = ARGV[1], now_ms()
call('ZADD', P .. 'wl', int(now + ARGV[2]), wid)
call('SET', P .. 'wi:' .. wid, ARGV[3], 'PX', int(3 * ARGV[2]))
call('SET', P .. 'wi:' .. wid .. ':at', int(now), 'PX', int(3 * ARGV[2]))
local lost, kept = {}, 0
for at = 4, #ARGV, 2 do
  local id, epoch = ARGV[at], ARGV[at + 1]
  local record = call('HGET', P .. 'w:' .. wid, id)
  if record and string.sub(record, 1, #epoch) == epoch then
    kept = kept + 1
  else
    lost[#lost + 1] = id
    lost[#lost + 1] = why_lost(id)
  end
end
local reply = { lost, call('HLEN', P .. 'w:' .. wid) > kept and 1 or 0, unpack(queue_lengths()) }
reply[#reply + 1] = call('GET', P .. 'wi:' .. wid .. ':drain') or ''
return reply
